"""Search spaces: decisions, sites and the networks that they mean."""
