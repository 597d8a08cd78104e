"""The closed-form laboratory: particles that are points, on priors whose scores are known exactly."""
