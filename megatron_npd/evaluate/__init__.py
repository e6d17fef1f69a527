"""`npd evaluate`: what any checkpoint, or any version of a run, scores; by our tasks or by lm-evaluation-harness."""
