-- Run once by the PostgreSQL image, when its volume is empty: the user of Grafana, who may read Tapeline's tables and
-- views and nothing else. `migrate` gives tapeline_reader (timescale.reader_role) what is to be read.
\set password `cat /run/secrets/grafana_db_password`
CREATE ROLE tapeline_reader NOLOGIN;
CREATE ROLE grafana LOGIN PASSWORD :'password' CONNECTION LIMIT 20 IN ROLE tapeline_reader;
-- A dashboard that asks too much is stopped; the sink goes on.
ALTER ROLE grafana SET statement_timeout = '30s';
ALTER ROLE grafana SET default_transaction_read_only = on;
