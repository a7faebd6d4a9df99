"""Job: what is online beside what was published (``spark-fs audit``)."""

from __future__ import annotations

import sys

from spark_fs import FeatureStore, console
from spark_fs.errors import ExitCode
from spark_fs.submit import job_arguments


def main(arguments: list[str]) -> int:
    """Run the job; exit code 4 where something is not as it should be."""
    options = job_arguments(__doc__, arguments, names=("sample",), many=("view",))

    def act() -> ExitCode:
        from spark_fs.audit import summary_text

        store = FeatureStore(options.repo, options.env)
        store.check_online()  # before Spark takes its seconds to start
        sample = int(options.sample) if options.sample else None
        with console.progress(store.spark):
            results, error = console.results_of(lambda: store.audit(options.view, sample=sample))
        as_json = options.output == "json"
        rows = [result.to_json() for result in results] if as_json else [row for result in results for row in result.to_rows()]
        console.say(summary_text(results))
        console.report(rows, error, options.output, title="Audited", empty="Nothing was published yet.")
        return ExitCode.OK if all(result.ok for result in results) else ExitCode.QUALITY_GATE

    return console.run(act, debug=options.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
