"""Evidence: encoders, scores with floor and ceiling, and the report."""
