"""VBench-I2V's ten dimensions, by its published rules, with networks from files of the user.

Paper: Huang et al. 2024 (VBench++, arXiv 2411.13503). Rules: Vchitect/VBench, vbench2_beta_i2v.
"""
