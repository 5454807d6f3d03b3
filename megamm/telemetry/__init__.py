"""Progress bar, metric logs, throughput and MFU."""
