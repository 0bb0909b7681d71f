"""Property tests are not judged by the speed of a busy machine."""

from hypothesis import settings

settings.register_profile("data", deadline=None)
settings.load_profile("data")
