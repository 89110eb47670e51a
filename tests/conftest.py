"""Real servers for the tests: the embedded ones, or the foreign ones that two variables of the environment name."""

pytest_plugins = ["tests.fixtures.kafka", "tests.fixtures.qdrant"]
