import pytest

from spd_core.train import train
from spd_launch.config import config_to_yaml
from spd_launch.run_record import write_environment


@pytest.fixture
def trained(make_config, make_run_dir, one_process):
    def make(name, *overrides, **update):
        config = make_config(*overrides).model_copy(update=update)
        run_dir = make_run_dir(name)
        run_dir.config_file.write_text(config_to_yaml(config))
        write_environment(run_dir, None)
        train(config, run_dir, one_process, lambda _step, _values: False)
        return run_dir

    return make
