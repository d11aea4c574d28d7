"""EntropyRegularizer: train a model so that few blocks of its attention matter."""

from entropy_attn.regularizer.regularizer import EntropyRegularizer, RegularizerStatistics

__all__ = ["EntropyRegularizer", "RegularizerStatistics"]
