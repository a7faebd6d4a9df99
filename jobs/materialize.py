"""Job: feature tables → online store (``spark-fs materialize`` and ``materialize-incremental``)."""

from __future__ import annotations

import sys
from functools import partial

from spark_fs import FeatureStore, console
from spark_fs.errors import ExitCode
from spark_fs.submit import job_arguments


def main(arguments: list[str]) -> int:
    """Run the job: with a start the interval, without one what is new; the exit code of the command."""
    flags, names = ("restate", "everything", "full"), ("max-rows-per-second",)
    options = job_arguments(__doc__, arguments, names=names, many=("view",), flags=flags, instants=("start", "end"))

    def act() -> ExitCode:
        store = FeatureStore(options.repo, options.env)
        store.check_online()  # before Spark takes its seconds to start
        budget = None if options.max_rows_per_second is None else int(options.max_rows_per_second)
        publish = partial(store.materialize_incremental, options.end)
        if options.start:
            how = {"restate": options.restate, "everything": options.everything, "full": options.full}
            publish = partial(store.materialize, options.start, options.end, **how)
        with console.progress(store.spark):
            results, error = console.results_of(lambda: publish(options.view, max_rows_per_second=budget))
        console.report([result.to_json() for result in results], error, options.output, title="Materialized")
        return ExitCode.OK

    return console.run(act, debug=options.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
