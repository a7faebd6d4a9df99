"""Job: a point-in-time correct training set, saved as a Delta table (``spark-fs dataset create``)."""

from __future__ import annotations

import sys

from spark_fs import FeatureStore, console
from spark_fs.errors import ExitCode
from spark_fs.submit import job_arguments

NAMES = ("name", "entities", "description", "strategy", "split", "stratify", "seed", "gap-days")
FLAGS, MANY = ("full-feature-names", "known-at", "explain", "strict"), ("feature", "service", "split-by", "label", "tag")


def main(arguments: list[str]) -> int:
    """Run the job; the exit code of the command."""
    options = job_arguments(__doc__, arguments, names=NAMES, many=MANY, flags=FLAGS)

    def act() -> ExitCode:
        from spark_fs.datasets.saving import parse_wish

        wish, store = parse_wish(options), FeatureStore(options.repo, options.env)
        with console.progress(store.spark):
            job = store.get_historical_features(
                options.entities, options.service[0] if options.service else options.feature,
                full_feature_names=options.full_feature_names, known_at=options.known_at, strategy=options.strategy or "auto",
            )  # fmt: skip
            console.say(job.explain())
            if options.explain:
                return ExitCode.OK
            dataset = job.save_as(wish)
            examples = [row.asDict() for row in dataset.to_spark_df().limit(3).collect()]
        console.show_manifest(dataset.manifest.to_json(), options.output, examples)
        return ExitCode.QUALITY_GATE if options.strict and dataset.manifest.report["warnings"] else ExitCode.OK

    return console.run(act, debug=options.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
