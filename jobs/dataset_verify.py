"""Job: are the rows of a saved dataset still those that its manifest signs? (``spark-fs dataset verify``)."""

from __future__ import annotations

import sys

from spark_fs import FeatureStore, console
from spark_fs.errors import ExitCode
from spark_fs.submit import job_arguments


def main(arguments: list[str]) -> int:
    """Run the job: exit code 0 if rows and checksum are as in the manifest, else 4."""
    options = job_arguments(__doc__, arguments, names=("name", "version"))

    def act() -> ExitCode:
        store = FeatureStore(options.repo, options.env)
        with console.progress(store.spark):
            verdict = store.get_dataset(options.name, int(options.version) if options.version else None).verify()
        console.show([verdict], options.output)
        return ExitCode.OK if verdict["identical"] else ExitCode.QUALITY_GATE

    return console.run(act, debug=options.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
