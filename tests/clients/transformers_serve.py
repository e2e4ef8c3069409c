"""`transformers serve` for an installed Pisces: the same arguments, for example `serve pisces-tiny --port 8123`.

The server of transformers (5.24) decides how to load a model, and whether it sees pictures, by static lists of the
library's own model types; the registration of other classes with the Auto classes, and --trust-remote-code, do not
reach them. Two entries in that list are all that is missing, and they are made here, in a process of their own.
"""

import sys

from transformers.cli.transformers import main
from transformers.models.auto import modeling_auto

import modeling_pisces


if __name__ == "__main__":
    name = modeling_pisces.PiscesForConditionalGeneration.__name__
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[modeling_pisces.PiscesConfig.model_type] = name
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[modeling_pisces.PiscesConfig.model_type] = name
    sys.exit(main())
