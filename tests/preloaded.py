"""What every forked process has behind it beside imports: the default configuration, composed, and
a heap that its garbage collections need not go through."""

import gc

from tests.models.build import compose

compose([])
gc.freeze()
