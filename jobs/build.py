"""Job: sources → feature tables (``spark-fs build``)."""

from __future__ import annotations

import sys

from spark_fs import FeatureStore, console
from spark_fs.errors import ExitCode
from spark_fs.submit import job_arguments


def main(arguments: list[str]) -> int:
    """Run the job; the exit code of the command."""
    options = job_arguments(__doc__, arguments, many=("view",), instants=("start", "end"))

    def act() -> ExitCode:
        store = FeatureStore(options.repo, options.env)
        with console.progress(store.spark):
            results, error = console.results_of(lambda: store.build(options.view, options.start, options.end))
        empty = "Nothing to build: every interval up to now is there."
        rows = [result.to_json() if options.output == "json" else result.to_row() for result in results]
        for result in results:
            if result.optimize_error:
                console.say(f"{result.view} is built, but was not optimized: {result.optimize_error}")
        console.report(rows, error, options.output, title="Built", empty=empty)
        return ExitCode.OK

    return console.run(act, debug=options.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
