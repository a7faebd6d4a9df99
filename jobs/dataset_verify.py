"""Job: is a saved dataset what its manifest signs, and does the join give it again? (``spark-fs dataset verify``)."""

from __future__ import annotations

import sys

from spark_fs import FeatureStore, console
from spark_fs.errors import ExitCode
from spark_fs.submit import job_arguments


def main(arguments: list[str]) -> int:
    """Run the job: exit code 4 if the rows are others, or with --strict if they could not be joined again; else 0."""
    options = job_arguments(__doc__, arguments, names=("name", "version"), flags=("stored-only", "strict"))

    def act() -> ExitCode:
        store = FeatureStore(options.repo, options.env)
        version = int(options.version) if options.version else None
        with console.progress(store.spark):
            verdict = store.datasets.verify(options.name, version, recompute=not options.stored_only)
        console.show_verdict(verdict.to_json(), options.output)
        passed = verdict.identical if options.strict else verdict.ok
        return ExitCode.OK if passed else ExitCode.QUALITY_GATE

    return console.run(act, debug=options.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
