package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"time"
)

// An authority signs the certificates of the sites. Its key is never written to a file.
type authority struct {
	path        string // the file with its certificate
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

// newAuthority makes an authority, and writes its certificate to a file.
func newAuthority(path string) (*authority, error) {
	ca := &authority{path: path, certificate: template509("sniproxy quick start")}
	ca.certificate.IsCA, ca.certificate.BasicConstraintsValid = true, true
	ca.certificate.KeyUsage = x509.KeyUsageCertSign
	certificate, key, err := ca.sign(ca.certificate)
	if err != nil {
		return nil, err
	}
	ca.key = key
	if ca.certificate, err = x509.ParseCertificate(certificate); err != nil {
		return nil, err
	}
	return ca, os.WriteFile(path, encode("CERTIFICATE", certificate), 0o644)
}

// issue returns a certificate for names and its key, in PEM.
func (ca *authority) issue(names []string) (certificate, key []byte, err error) {
	template := template509(names[0])
	template.DNSNames = names
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	der, private, err := ca.sign(template)
	if err != nil {
		return nil, nil, err
	}
	derKey, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, nil, err
	}
	return encode("CERTIFICATE", der), encode("PRIVATE KEY", derKey), nil
}

// sign signs a certificate for a new key. The first one it signs is the authority's own.
func (ca *authority) sign(template *x509.Certificate) (der []byte, key *ecdsa.PrivateKey, err error) {
	if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, nil, err
	}
	signer := ca.key
	if signer == nil {
		signer = key
	}
	der, err = x509.CreateCertificate(rand.Reader, template, ca.certificate, key.Public(), signer)
	return der, key, err
}

// template509 returns what all certificates have.
func template509(name string) *x509.Certificate {
	serial, _ := rand.Int(rand.Reader, big.NewInt(1<<62)) // rand.Reader never fails
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().AddDate(0, 0, 30),
	}
}

func encode(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}
