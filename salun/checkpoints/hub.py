"""The client of the Hugging Face hub, asked so that a machine without network hears of it soon, and in one line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 5.0  # seconds in which the hub must answer


@contextmanager
def silent_client() -> Iterator[None]:
    """Context manager: the client logs nothing; what goes wrong is in its errors."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def cache_without_network(repo: str) -> Iterator[bool]:
    """Context manager: the client looks into the local cache alone where the hub does not answer at once.

    Otherwise it would try for half a minute, and then look there.

    Args:
        repo: Id of a data set.

    Yields:
        Whether the hub answers.
    """
    from huggingface_hub import constants, dataset_info

    before = constants.HF_HUB_OFFLINE
    with silent_client():
        answers = True
        try:
            dataset_info(repo, timeout=PATIENCE)
        except Exception as error:  # with a response, such as that there is no such data set, or of the network
            answers = getattr(error, "response", None) is not None
        constants.HF_HUB_OFFLINE = before or not answers
        try:
            yield answers
        finally:
            constants.HF_HUB_OFFLINE = before
