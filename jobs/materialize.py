"""Job: feature tables → online store (``spark-fs materialize`` and ``materialize-incremental``)."""

from __future__ import annotations

import sys

from spark_fs import FeatureStore, console
from spark_fs.errors import ExitCode
from spark_fs.submit import job_arguments


def main(arguments: list[str]) -> int:
    """Run the job: with a start the interval, without one what is new; the exit code of the command."""
    options = job_arguments(__doc__, arguments, many=("view",), flags=("restate", "everything"), instants=("start", "end"))

    def act() -> ExitCode:
        store = FeatureStore(options.repo, options.env)
        store.check_online()  # before Spark takes its seconds to start
        with console.progress(store.spark):
            if options.start:
                how = {"restate": options.restate, "everything": options.everything}
                results, error = console.results_of(lambda: store.materialize(options.start, options.end, options.view, **how))
            else:
                results, error = console.results_of(lambda: store.materialize_incremental(options.end, options.view))
        console.report([result.to_json() for result in results], error, options.output, title="Materialized")
        return ExitCode.OK

    return console.run(act, debug=options.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
