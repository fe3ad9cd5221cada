"""What the tests of trainers share."""

from functools import partial

import pytest

from tests.trainers.made_refl import config


@pytest.fixture
def refl(tmp_path):
    """A configuration of ReFL, of a preset; see ``made_refl.config``."""
    return partial(config, tmp_path)
