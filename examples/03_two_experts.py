"""Stage 3: extrapolated weights while it is noisy, fine-tuned ones for the details.

New: two experts and a boundary. Compare with 02: the motion stays, the prompt is obeyed.
"""

import torch

from motionmerge import Checkpoint, contact_sheet, dare, experts, load_photo, load_pocket

base, tuned = Checkpoint.load("pocket:base"), Checkpoint.load("pocket:tuned")
motion = tuned - base
pair = {
    "dynamics": base + dare(-0.5 * motion, drop_rate=0.7, seed=0),
    "consistency": tuned,
}
pipe = load_pocket()
with experts(pipe, pair, boundary=0.8) as bank:
    print(bank.schedule.draw())
    video = pipe(
        load_photo("coffee"),
        "the camera pans left",
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames[0]
contact_sheet([video], labels=["two experts"], every=3, path="03_two_experts.png")
