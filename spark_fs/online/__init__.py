"""The online store: bytes of keys and values, the guarded write, the embedded server, reading. Without Spark."""
