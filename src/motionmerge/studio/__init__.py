"""The studio: a page on this machine where a photo, a prompt and a knob become videos."""
