"""One loaded server for all tests of this folder."""

import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    pytest.importorskip("diffusers")
    from tests.checkpoint_folder import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("serving") / "random")


@pytest.fixture(scope="session")
def served(checkpoint):
    from tests.pisces_serving.serving_fixtures import Served

    found = Served(checkpoint)
    yield found
    found.close()
