"""Job: published values, written to the online store again (``spark-fs repair``)."""

from __future__ import annotations

import sys

from spark_fs import FeatureStore, console
from spark_fs.errors import ExitCode
from spark_fs.submit import job_arguments


def main(arguments: list[str]) -> int:
    """Run the job; the exit code of the command."""
    options = job_arguments(__doc__, arguments, many=("view",))

    def act() -> ExitCode:
        store = FeatureStore(options.repo, options.env)
        store.check_online()  # before Spark takes its seconds to start
        with console.progress(store.spark):
            results, error = console.results_of(lambda: store.repair(options.view))
        rows = [result.to_json() for result in results]
        console.report(rows, error, options.output, title="Repaired", empty="Nothing was published yet.")
        return ExitCode.OK

    return console.run(act, debug=options.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
