"""A calibration that has finished, for every test that compares with one."""

from __future__ import annotations

import pytest
from fake_model import FakeModel, tune

from autotune import Calibration


@pytest.fixture(scope="session")
def tuned() -> tuple[FakeModel, Calibration]:
    """The model and its calibration with PROMPTS and SETTINGS; not to be changed."""
    model = FakeModel()
    return model, tune(model)
