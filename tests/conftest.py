"""Real servers for the tests: the embedded ones, or foreign ones that STREAMTOWER_TEST_KAFKA and STREAMTOWER_TEST_QDRANT name."""

pytest_plugins = ["tests.fixtures.kafka", "tests.fixtures.qdrant"]
