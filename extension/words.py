"""The core's messages in the page's words: its controls in place of the command line's options and orders."""

from __future__ import annotations

import re

from .controls import label
from .limits import truncated

_ORDERS = {  # what the core says → what can be done here
    r"the same command with --resume --run-dir .*? and another --output writes it": "mend that, and Resume writes it",
    r"--run-dir .*? holds a run that cannot be resumed like this: (.*)\. Repeat its options, or name another folder":
        r"this run cannot go on, as its \1: begin a new job",
    r"--run-dir .*?: another run is at work there; wait for it, or name another":
        "another process is still at work in this run: wait for it",
    r"; --models-dir names folders to look in": "",
    r", or a checkpoint's name in a folder that --models-dir tells": "",
    r": make room, or name a place on another disk": ": make room",
    r", or add --force": "",
    r", or, if you trust the file, --allow-pickle \([^)]*\)": "",
    r"make one with `salun mask --model [^`]*`": "make one with “Only make the mask”",
    r"; `salun delta apply` with --fine-tune-of-base, and .*? adds the differences to (?:it|another model)": "",
    r"apply all at once by `salun delta stack`": "choose all at once under Deltas",
    r"--run-dir": "the run's folder",
    r"--output": "the new file",
}  # fmt: skip


def in_the_pages_words(text: str) -> str:
    """A message of the core as it can be followed on the page; of a long one its beginning and its end.

    The patterns look ahead for what may never come, and so take the square of a text's length.
    """
    text = truncated(text)
    for theirs, ours in _ORDERS.items():
        text = re.sub(theirs, ours, text)
    return re.sub(r"(?<![\w-])--([a-z][a-z0-9-]*)", lambda flag: label(flag[1].replace("-", "_")), text)
