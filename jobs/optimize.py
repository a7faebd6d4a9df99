"""Job: feature tables with one sorted file a bucket again (``spark-fs optimize``)."""

from __future__ import annotations

import sys

from spark_fs import FeatureStore, console
from spark_fs.errors import ExitCode
from spark_fs.submit import job_arguments


def main(arguments: list[str]) -> int:
    """Run the job; the exit code of the command."""
    options = job_arguments(__doc__, arguments, names=("buckets",), many=("view",))

    def act() -> ExitCode:
        store = FeatureStore(options.repo, options.env)
        buckets = int(options.buckets) if options.buckets else None
        with console.progress(store.spark):
            results, error = console.results_of(lambda: store.optimize(options.view, buckets))
        empty = "Nothing to optimize: no feature table is built yet."
        rows = [result.to_json() for result in results]
        console.report(rows, error, options.output, title="Optimized", empty=empty)
        return ExitCode.OK

    return console.run(act, debug=options.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
