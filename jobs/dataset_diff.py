"""Job: what one version of a dataset has otherwise than another (``spark-fs dataset diff``)."""

from __future__ import annotations

import sys

from spark_fs import FeatureStore, console
from spark_fs.errors import ExitCode
from spark_fs.submit import job_arguments


def main(arguments: list[str]) -> int:
    """Run the job: exit code 3 if they differ, else 0."""
    options = job_arguments(__doc__, arguments, names=("name", "old", "new"))

    def act() -> ExitCode:
        store = FeatureStore(options.repo, options.env)
        with console.progress(store.spark):
            found = store.datasets.diff(options.name, int(options.old), int(options.new) if options.new else None)
        console.show_diff(found.to_json(), options.output)
        return ExitCode.OK if found.is_equal else ExitCode.CHANGES_PRESENT

    return console.run(act, debug=options.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
