"""The paper's method on Stable Video Diffusion, which has no prompts: a fine-tune and its base.

New: `Recipe.edg` writes the recipe of the paper (two experts with DARE) for two sets of weights.

    python 08_svd.py FINE_TUNED_FOLDER stable-video-diffusion-img2vid photo.jpg
    python 08_svd.py --tiny
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

    pipe, image = tiny_models.svd(), load_photo("coffee")
    tuned = {f"unet.{name}": weight for name, weight in pipe.unet.state_dict().items()}
    base, settings = tiny_models.moved(pipe.unet), VideoSettings(**tiny_models.SMALL)
else:
    import torch

    model, parent, photo = sys.argv[1:]
    folder = find_pipeline(model)
    pipe = load_pipeline(folder, dtype=torch.float16)
    print(place(pipe, folder, default_device(), torch.float16))
    tuned, base = folder.path, find_pipeline(parent).path
    image, settings = load_image(photo), VideoSettings()

videos = {"fine-tuned": make_video(pipe, image, settings)}
for alpha in (0.25, 0.5):
    recipe = Recipe.edg(base="memory:base", tuned="memory:tuned", alpha=alpha)
    with experts(pipe, recipe, inputs={"base": base, "tuned": tuned}):
        videos[f"alpha {alpha}"] = make_video(pipe, image, settings)
every = max(1, len(videos["fine-tuned"]) // 6)
contact_sheet(list(videos.values()), labels=list(videos), every=every, path="08_svd.png")
