"""Text of strangers in a terminal: names of files, prompts, metadata."""


def harmless(text: str) -> str:
    """Return a text on one line, without what a terminal would obey."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)
