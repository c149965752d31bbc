"""A photo and a prompt become a video, with one set of weights."""

from motionmerge import contact_sheet, load_photo, load_pocket, write_video

pipe = load_pocket("tuned")
video = pipe(load_photo("coffee"), "the camera pans left", output_type="pt").frames[0]
write_video("01_tuned.mp4", video, fps=8, scale=4)
contact_sheet([video], labels=["tuned"], every=3, path="01_tuned.png")
