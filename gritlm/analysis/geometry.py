"""The geometry level: CKA and nearest neighbours."""
