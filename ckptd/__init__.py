"""ckptd keeps a running machine alive when its host dies.

Two daemons replicate a guest epoch by epoch: the primary harvests the pages that the guest has dirtied and streams
them; the secondary holds a replica that is always exactly one committed epoch, and resumes the guest from it.
"""

__version__ = "0.1.0"
