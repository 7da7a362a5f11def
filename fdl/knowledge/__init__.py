"""What specialists know of the proxy set: public encoder, confidence, calibration, aggregation."""
