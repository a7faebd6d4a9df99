"""Job: delete a version of a dataset (``spark-fs dataset delete``)."""

from __future__ import annotations

import sys

from spark_fs import FeatureStore, console
from spark_fs.submit import job_arguments


def main(arguments: list[str]) -> int:
    """Run the job; the exit code of the command."""
    options = job_arguments(__doc__, arguments, names=("name", "version"))

    def act() -> None:
        store = FeatureStore(options.repo, options.env)
        deleted = store.datasets.delete(options.name, int(options.version))
        console.show([{"deleted": deleted.reference, "rows": deleted.rows, "path": deleted.path}], options.output)

    return console.run(act, debug=options.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
