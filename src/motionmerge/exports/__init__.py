"""Experts for other tools: LoRAs, single files, two-expert folders."""
