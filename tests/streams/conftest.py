"""Properties of streams run without a deadline: the first call of a kernel compiles it, and machines are busy."""

from hypothesis import settings

settings.register_profile("streams", deadline=None)
settings.load_profile("streams")
