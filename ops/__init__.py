"""What watches a running Streamtower: Prometheus rules, Grafana dashboards, and pages of docs/ made from the code."""
