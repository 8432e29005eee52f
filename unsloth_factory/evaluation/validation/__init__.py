"""Answers to held-out samples: metrics, causes, differences, and blind review by people."""
