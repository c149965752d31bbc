"""Stage 2: the same prompt and noise with the fine-tuning reversed in weight space: more motion.

New: checkpoints are subtracted and added; `experts` runs the result and puts the weights back.
"""

import torch

from motionmerge import Checkpoint, contact_sheet, experts, load_photo, load_pocket

base, tuned = Checkpoint.load("pocket:base"), Checkpoint.load("pocket:tuned")
pipe = load_pocket()
videos = {}
for motion in (-1.0, 0.0, 0.5):
    with experts(pipe, {"all": base - motion * (tuned - base)}):
        videos[f"motion {motion:+}"] = pipe(
            load_photo("coffee"),
            "the camera pans left",
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).frames[0]
contact_sheet(list(videos.values()), labels=list(videos), every=3, path="02_extrapolate.png")
