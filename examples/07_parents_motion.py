"""Image-to-video models move less than the text-to-video models they were made of: take it back.

    dynamics = i2v + 0.3 * (t2v - i2v)     of the tensors that both have, while it is noisy

New: experts as plain tensors. What an expert does not name (the layer that reads the image) stays
the model's own. Measured on no released model yet: 0.3 is where to begin.

    python 07_parents_motion.py I2V_FOLDER T2V_FOLDER photo.jpg
    python 07_parents_motion.py --tiny
"""

import sys
from pathlib import Path

import torch

from motionmerge import (
    VideoSettings,
    default_device,
    experts,
    find_pipeline,
    load_image,
    load_photo,
    load_pipeline,
    make_video,
    open_weights,
    place,
    write_video,
)

AMOUNT = 0.3

if sys.argv[1:] in ([], ["--tiny"]):
    import tiny_models

    pipe, image = tiny_models.wan_2_2(), load_photo("coffee")
    parent, settings = tiny_models.t2v_parent("07_parent"), VideoSettings(**tiny_models.SMALL)
else:
    model, parent, photo = sys.argv[1:]
    folder = find_pipeline(model)
    pipe = load_pipeline(folder, dtype=torch.bfloat16)
    print(place(pipe, folder, default_device(), torch.bfloat16))
    image, settings = load_image(photo), VideoSettings()

own = pipe.transformer.state_dict()
with open_weights(Path(parent) / "transformer") as t2v:
    shared = [name for name in own if name in t2v and t2v.shape(name) == own[name].shape]
    dynamics = {
        name: torch.lerp(own[name].cpu().float(), t2v.read(name).float(), AMOUNT).to(own[name])
        for name in shared
    }
consistency = {name: own[name] for name in shared}
print(f"{len(shared)} of {len(own)} tensors are shared")

pair = {"dynamics": dynamics, "consistency": consistency}
with experts(pipe, pair, boundary=0.9, module="transformer"):
    video = make_video(pipe, image, settings.changed(prompt="waves roll onto the beach"))
write_video("07_parents_motion.mp4", video, fps=16)
