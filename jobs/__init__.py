"""One spark-submit entry point per job; installed as ``spark_fs.jobs``."""
