"""A generated world of pictures with questions and exact answers, and the tiny LMM that lives in it."""

from llava_fa.world.samples import Sample as Sample
from llava_fa.world.samples import calibration_samples as calibration_samples
from llava_fa.world.samples import held_out_samples as held_out_samples
