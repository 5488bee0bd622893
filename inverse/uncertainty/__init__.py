"""How sure: posteriors around an estimate, and by Markov chains.

    laplace        a few parameters, dense: intervals, and which combinations the data fix
    low_rank       fields: the prior's covariance less what the data say, of low rank
    mcmc           the posterior itself, by chains that do not slow down as a mesh is refined
    diagnostics    whether chains can be trusted
    model_error    what the model itself gets wrong, in the likelihood

The names below are imported from here, the rest from its module.
"""

from inverse.uncertainty.laplace import FIXED, Combination, Laplace
from inverse.uncertainty.model_error import ModelError

__all__ = ["FIXED", "Combination", "Laplace", "ModelError"]
