"""A finished run to review, trained once for all tests of the page."""

import pytest

from contralto.data.decisions import DATABASE
from contralto.pipelines.capro import fit_capro

from tests.tiny import FROZEN


@pytest.fixture(scope="session")
def finished(tiny_parquet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    return fit_capro(str(tiny_parquet), folder, definitions=tiny_parquet.with_name("classes.yaml"), **FROZEN)


@pytest.fixture
def run(finished):
    """The finished run, with nothing decided yet."""
    for path in finished.glob(f"{DATABASE}*"):
        path.unlink()
    return finished
