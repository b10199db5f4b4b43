"""A training run in which one replica drifts: started by a launcher, see test_drift.py.

python tests/drifting_job.py RANK STEPS train --data ...

After so many steps, 0.5 is added to the first element of a norm's weight on that rank.
"""

import sys

from cupytron.cli.main import run
from cupytron.launcher import launched_rank


def plant_after(steps: int) -> None:
    from cupytron.trainer import Trainer

    whole = Trainer.start_step

    def planted(self, *args):
        if self.step == steps:
            parameters = {
                parameter.name: parameter for _, parameter in self.model.named_parameters()
            }
            parameters["blocks.0.norm1.weight"].data[0] += 0.5
        return whole(self, *args)

    Trainer.start_step = planted


def main() -> None:
    rank, steps, *arguments = sys.argv[1:]
    if launched_rank() == int(rank):
        plant_after(int(steps))
    run(arguments)


if __name__ == "__main__":
    main()
