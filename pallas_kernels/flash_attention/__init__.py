"""Softmax attention: one public function (`api`) over several implementations."""
