"""Wan 2.2 with a distilled LoRA, without its slow motion: the first step runs without the LoRA.

New: a real model from a folder, LoRAs with a weight for each noise level, a shipped recipe.

    python 05_wan_lightning.py Wan2.2-I2V-A14B-Diffusers high.safetensors low.safetensors photo.jpg
    python 05_wan_lightning.py --tiny
"""

import sys

from motionmerge import (
    VideoSettings,
    default_device,
    experts,
    find_pipeline,
    load_image,
    load_photo,
    load_pipeline,
    make_video,
    place,
    write_video,
)

if sys.argv[1:] in ([], ["--tiny"]):
    import tiny_models

    pipe, image = tiny_models.wan_2_2(), load_photo("coffee")
    high, low = (tiny_models.lora(f"05_{seed}.safetensors", seed) for seed in (1, 2))
    settings = VideoSettings(**tiny_models.SMALL)
else:
    import torch

    model, high, low, photo = sys.argv[1:]
    folder = find_pipeline(model)
    pipe = load_pipeline(folder, dtype=torch.bfloat16)
    print(place(pipe, folder, default_device(), torch.bfloat16))
    image, settings = load_image(photo), VideoSettings(num_inference_steps=8)

files = {"high": high, "low": low}
with experts(pipe, recipe="wan22-lightning", inputs=files) as bank:
    print(bank.schedule.draw())
    video = make_video(
        pipe,
        image,
        settings.changed(prompt="steam rises from the cup", guidance_scale=3.5),
        guidance_scale_2=1.0,  # distilled weights need none; the opening step does
    )
write_video("05_wan_lightning.mp4", video, fps=16)
