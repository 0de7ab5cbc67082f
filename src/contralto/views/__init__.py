"""How positives are made: random views that are functions of (seed, epoch, sample, view)."""
