"""Your LoRA made videos stand still: away from it while it is noisy, all of it for the details.

New: the knob on a LoRA. No second model is loaded and no weight of the model is touched.

    python 06_lora_rescue.py MODEL_FOLDER my_lora.safetensors photo.jpg
    python 06_lora_rescue.py --tiny
"""

import sys

from motionmerge import (
    Recipe,
    VideoSettings,
    contact_sheet,
    default_device,
    experts,
    find_pipeline,
    load_image,
    load_photo,
    load_pipeline,
    make_video,
    place,
)

if sys.argv[1:] in ([], ["--tiny"]):
    import tiny_models

    pipe, image = tiny_models.wan_2_2(), load_photo("coffee")
    lora, settings = tiny_models.lora("06_lora.safetensors", 1), VideoSettings(**tiny_models.SMALL)
else:
    import torch

    model, lora, photo = sys.argv[1:]
    folder = find_pipeline(model)
    pipe = load_pipeline(folder, dtype=torch.bfloat16)
    print(place(pipe, folder, default_device(), torch.bfloat16))
    image, settings = load_image(photo), VideoSettings()

videos = {}
for motion in (-1.0, 0.25, 0.5):  # at -1 the LoRA has its full strength everywhere, as if loaded
    with experts(pipe, Recipe.knob(lora=lora, motion=motion)):
        videos[f"motion {motion:+}"] = make_video(
            pipe, image, settings.changed(prompt="a dancer turns around")
        )
every = max(1, len(videos["motion -1.0"]) // 6)
contact_sheet(list(videos.values()), labels=list(videos), every=every, path="06_lora_rescue.png")
